"""The update: learning rate, global norm and clipping, the sharded step."""

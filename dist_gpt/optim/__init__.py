"""Weight updates: learning rate, global norm and clipping, the sharded step, the DeepSpeed engine."""

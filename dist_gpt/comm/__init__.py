"""The only room that touches torch.distributed: groups, the mesh, the ledger, the rendezvous."""

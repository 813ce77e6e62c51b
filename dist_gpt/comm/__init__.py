"""Communication, the only package that uses torch.distributed: groups, the mesh, the ledger, the rendezvous."""

"""Level 3: the data plane (links, collectives) and the control plane: the only home of torch.distributed and zmq."""

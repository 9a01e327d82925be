"""Level 3: data plane (links, collectives) and control plane; the only package that uses torch.distributed and zmq."""

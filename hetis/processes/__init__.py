"""Level 1: processes of one host: how they are started, limited, woken, and seen to end. No torch, no zmq."""

import torch


# Tiny matrices gain nothing from threads, and test processes that each run several slow each other down.
torch.set_num_threads(1)

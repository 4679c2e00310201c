"""The engine on GPUs. Nothing here is imported by ``import ep_rt``; CUDA is touched inside functions only."""

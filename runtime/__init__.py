"""How a run is carried out: command line, devices, processes, checkpoints, the Hugging Face hub, logs, optimizers."""

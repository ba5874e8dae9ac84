"""How the tests of transformers' Trainer and of TRL's train: shortly, on the CPU, without reports."""

SHORT = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2,
    "learning_rate": 1e-2,
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}

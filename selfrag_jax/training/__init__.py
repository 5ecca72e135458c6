"""Training of every model of the project: one trainer, its config, loss and optimizer."""

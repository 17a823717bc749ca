"""What the training loop of train_util is made of."""

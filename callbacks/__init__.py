"""What happens during training: schedule, hook, log."""

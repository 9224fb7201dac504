"""What surrounds the training loop: settings, set-up, the run folder, metrics, samples, processes."""

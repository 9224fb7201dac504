"""The parts of a training run around the loop: settings, setup, run folder, metrics, samples, processes."""

"""First-party generators, trainers, models, data sets and loggers: one idea a file, seeing only the public core."""

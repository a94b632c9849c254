"""A step of ``AsyPPOTrainer`` beside one of TRL's ``GRPOTrainer``: CPU seconds by phase, and peak memory."""

"""AsyPPO: a PPO trainer whose policy is guided by a few mini-critics (arXiv 2510.01656)."""

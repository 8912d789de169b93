"""Real text: HotpotQA trajectories that AutoAct recorded, and an agent loop over what its tools once said."""

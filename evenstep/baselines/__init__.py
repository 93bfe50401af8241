"""Every optimizer by name: ours, torch's and other packages', with how a model's parameters become its groups."""

"""Where the time goes: a bundle measured stage by stage, beside others and beside what the machine could do."""

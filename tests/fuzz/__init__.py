"""Campaigns that look for faults by chance; each module has run(seconds, seed), which returns what it found."""

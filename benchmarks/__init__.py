"""What this engine takes, measured beside its peers in the same run. Results that were kept are in results/."""

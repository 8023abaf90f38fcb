"""What serves a user beside the results: doctor, cost, memory, leases, the reward service."""

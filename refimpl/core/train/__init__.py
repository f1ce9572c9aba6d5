"""Training: the one loop and what plugs into it (losses, schedules, samplers, masks, outer steps)."""

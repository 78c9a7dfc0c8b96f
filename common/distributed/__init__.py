"""The places of ranks in a job, and how ranks agree."""

"""Teachers that have spoken already: what they predict for a run's target tokens, kept on disk."""

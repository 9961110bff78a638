"""The study behind the figures in docs/algorithm.md: what `lamb16 compare` runs, tabulates and plots."""

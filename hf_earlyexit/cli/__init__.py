"""The command line `hf-earlyexit`: one module per group of verbs. No other package prints."""

"""What tests of experiments and of pages share: settings, sweeps, run folders, pages, a browser."""

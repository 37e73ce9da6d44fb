"""How `robustft.functional` is computed: `reference` (eager PyTorch), `native` (compiled operators), `dispatch`."""

"""The control plane: it accepts, stores, dispatches and answers. It never imports torch, transformers, peft or worker."""

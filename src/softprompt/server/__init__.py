"""Many prompts of one base model over HTTP; needs the extra ``serve``."""

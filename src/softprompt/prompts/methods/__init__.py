"""The methods, one file each: configuration, module, initialiser and, where a method has its own, the loss."""

"""Import paths of PEFT that documents name; the code lives elsewhere and is only re-exported here."""

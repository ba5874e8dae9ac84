"""What is learned: configurations and initialisers. No model, no tokenizer and no weights file is touched here."""

# Imported so that a saved configuration of any method finds its class.
from softprompt.prompts import cpt as cpt
from softprompt.prompts import multitask as multitask
from softprompt.prompts import p_tuning as p_tuning

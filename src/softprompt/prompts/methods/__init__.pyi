from .multitask import SourcePrompt as SourcePrompt

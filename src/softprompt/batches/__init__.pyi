from .parts import Parts as Parts
from .run import prompts_in as prompts_in
from .run import run_batch as run_batch
from .settings import BatchSettings as BatchSettings
from .worker import BatchTask as BatchTask
from .worker import BatchWorker as BatchWorker

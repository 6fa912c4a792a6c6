"""Where ``fabric.log`` writes: CSV, TensorBoard, Weights & Biases, MLflow, or a :class:`Logger` of your own.

The four here write on rank 0 alone; on the others every method does nothing. They open what they write to when there is
first something to write. An object of your own is called on every rank, unless its ``on_rank`` says otherwise; loggers
of Lightning look at a variable of Lightning's that says which rank this is, which ``Fabric`` sets for them.
"""

from fabriclite.loggers.csv_logger import CSVLogger
from fabriclite.loggers.mlflow_logger import MLflowLogger
from fabriclite.loggers.protocol import Logger
from fabriclite.loggers.tensorboard_logger import TensorBoardLogger
from fabriclite.loggers.wandb_logger import WandbLogger

__all__ = ["CSVLogger", "Logger", "MLflowLogger", "TensorBoardLogger", "WandbLogger"]

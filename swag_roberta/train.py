"""Fine-tune RoBERTa on SWAG, or train a small RoBERTa from scratch.

    python swag_roberta/train.py --checkpoint_dir ./checkpoints --train_batch_size 16 --learning_rate 1e-05 \\
        --weight_decay 0.001 --num_train_epochs 3 --seed 1004

Prints loss and accuracy on the training and validation questions; swag_roberta/README.md tells costs and figures.
"""

from influence_core.experiments import training
from swag_roberta.task import SwagTask

if __name__ == "__main__":
    training.main(SwagTask, __doc__)

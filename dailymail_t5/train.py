"""Fine-tune T5 on CNN/DailyMail, or train a small T5 from scratch.

    python dailymail_t5/train.py --checkpoint_dir ./checkpoints --train_batch_size 16 --eval_batch_size 32 \\
        --learning_rate 5e-05 --weight_decay 0.01 --num_train_epochs 3 --seed 1004

Prints the loss, and ROUGE of the summaries written for the validation articles; dailymail_t5/README.md tells figures.
"""

from dailymail_t5.task import DailyMailTask
from influence_core.experiments import training

if __name__ == "__main__":
    training.main(DailyMailTask, __doc__)

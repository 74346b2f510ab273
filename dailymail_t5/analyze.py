"""Score every validation summary against every training summary of CNN/DailyMail, and show the most influential.

    python dailymail_t5/analyze.py --query_batch_size 10 --train_batch_size 16 --num_queries 10 \\
        --checkpoint_dir ./checkpoints --factor_strategy ekfac

Prints the plan, the stage table and articles with their most influential one; dailymail_t5/README.md tells figures.
"""

from dailymail_t5.task import DailyMailTask
from influence_core.experiments import analysis

if __name__ == "__main__":
    analysis.main(DailyMailTask, __doc__)

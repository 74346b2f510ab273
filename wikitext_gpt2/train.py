"""Fine-tune GPT-2 on WikiText-2, or train a small GPT-2 from scratch.

    python wikitext_gpt2/train.py --checkpoint_dir ./checkpoints --train_batch_size 8 --eval_batch_size 16 \\
        --learning_rate 3e-05 --weight_decay 0.01 --num_train_epochs 3 --seed 1004

Prints the perplexity of the training and validation set; wikitext_gpt2/README.md tells costs and figures.
"""

from influence_core.experiments import training
from wikitext_gpt2.task import WikiTextTask

if __name__ == "__main__":
    training.main(WikiTextTask, __doc__)

def command_line(description: str) -> argparse.ArgumentParser:
    """An argument parser with the arguments that every training script has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("recipe", help="YAML file in configs/")
    parser.add_argument("--dataset", help="Hub id, local folder or file to use instead of the recipe's data set")
    parser.add_argument("--output_dir", help="folder to save to (default: runs/<recipe name>)")
    parser.add_argument("--seed", type=int, help="training seed to use instead of the recipe's seed")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a recipe field, e.g. training.num_train_epochs=1"
    )
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="delete an earlier run in output_dir and start again")
    existing.add_argument("--resume", action="store_true", help="continue the run in output_dir from its last checkpoint")
    return parser

"""The pages on which people rank completions, and on which the owner sees what comes of it."""

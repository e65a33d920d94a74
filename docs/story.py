"""The story that figures, screenshots and the site's page of a pass show, by the demonstration model itself."""

STORY = """Once upon a time there was a little girl named Lily. She was three years old and was very curious. She \
wanted to explore the world.
One day, she went outside to explore the woods. She found a big tree and wanted to climb it. She climbed up the tree \
and stumbled. Suddenly, she heard a loud noise. It was a little girl. She was worried because she was scared. She ran \
around the tree and saw a kind man."""
N_STORY = 90  # tokens: a window and a half

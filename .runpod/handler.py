"""RunPod's Hub looks for a file of this name. The worker is a program without Python: the image's command, start.sh,
starts it, and nothing runs this."""

import os


def main() -> None:
    os.execvp("/app/start.sh", ["/app/start.sh"])


if __name__ == "__main__":
    main()

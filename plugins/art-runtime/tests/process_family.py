"""A program for the tether's tests: it has a child in its group, one in a session of its own, and an orphan.

    process_family.py PIDS_FILE polite|stubborn

Writes its own pid and theirs once all are there. Stubborn ones ignore SIGTERM.
"""

import os
import signal
import subprocess
import sys
import time


def main(pids_file: str, manners: str) -> None:
    """Start the family and wait to be ended."""
    if manners == "stubborn":
        # Ignored signals stay ignored across exec, so the whole family is stubborn.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stay = [sys.executable, "-S", "-c", "import time; time.sleep(300)"]
    near = subprocess.Popen(stay)
    far = subprocess.Popen(stay, start_new_session=True)
    leave = f"import subprocess; print(subprocess.Popen({stay!r}, start_new_session=True, stdout=-3, stderr=-3).pid)"
    orphan = subprocess.run([sys.executable, "-S", "-c", leave], stdout=subprocess.PIPE, text=True).stdout
    with open(f"{pids_file}.new", "w", encoding="utf-8") as file:
        file.write(f"{os.getpid()} {near.pid} {far.pid} {orphan}")
    os.rename(f"{pids_file}.new", pids_file)
    time.sleep(300)


if __name__ == "__main__":
    main(*sys.argv[1:])

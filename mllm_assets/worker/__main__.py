"""`python -m mllm_assets.worker TASK.json RESULT.json`."""

from mllm_assets.worker.run import main

if __name__ == "__main__":
    main()

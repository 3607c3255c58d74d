"""Create the bucket $PAML_BUCKET, unless it exists, in the store that the AWS_ variables name."""

import os
import sys


def make_bucket(name: str) -> str:
    """Create the bucket unless it exists, and return a message. Raises botocore's ClientError if the store refuses."""
    from paml.storage import s3

    client = s3.client()
    if name in {bucket["Name"] for bucket in client.list_buckets().get("Buckets", [])}:
        return f"s3://{name} exists"
    client.create_bucket(Bucket=name)
    return f"created s3://{name}"


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    print(make_bucket(os.environ["PAML_BUCKET"]))

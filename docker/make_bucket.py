"""Make the bucket PAML_BUCKET where it is not there, in the store that the AWS_ variables name."""

import os
import sys


def make_bucket(name: str) -> str:
    """What was done, in words. Raises botocore's ClientError where the store refuses."""
    from paml import s3

    client = s3.client()
    if name in {bucket["Name"] for bucket in client.list_buckets().get("Buckets", [])}:
        return f"s3://{name} is there"
    client.create_bucket(Bucket=name)
    return f"s3://{name} made"


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    print(make_bucket(os.environ["PAML_BUCKET"]))

"""A model behind `build_application` on a Ray of two nodes, both on this machine, until standard input ends.

    python tests/gateway_on_two_nodes.py FOLDER PORT

Each node has room for one replica. Serve's own HTTP server stands in front, as on Kubernetes, and the gateway reaches the replicas
by Serve's handles.
"""

import sys
import tempfile

from rlhf_ray.serving.server_ray import check_ray

KEY = "key-of-the-gateway"
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000, "node_ip_address": "127.0.0.1", "include_dashboard": False}


def main(folder: str, port: str) -> None:
    check_ray()  # before Ray is imported
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from rlhf_ray.actors.ray_start import prepare_home
    from rlhf_ray.serving.deployment import build_application

    prepare_home(makes_token=True)
    args = {"model": folder, "name": "model", "replicas": 2, "threads": 1, "precision": "float32", "api_key": KEY}
    with tempfile.TemporaryDirectory(prefix="gateway_", ignore_cleanup_errors=True) as own:
        node = NODE | {"temp_dir": own}  # Ray's usual folder says which Ray of the machine is the current one
        cluster = Cluster(initialize_head=True, head_node_args=node)
        try:
            cluster.add_node(**node)
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": int(port)})
            serve.run(build_application(args))
            print("ready", len(ray.nodes()), flush=True)
            sys.stdin.read()
        finally:
            ray.shutdown()
            cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])

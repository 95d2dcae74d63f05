from hub_server import HubServer
from test_hub import run


def test_subfolder_of_the_hub_gets_no_card_or_code(tmp_path):
    hub = HubServer()
    try:
        run(hub, tmp_path, 'tiny_pipeline().push_to_hub("lab/robots", subfolder="arm")')
        names = set(hub.repositories["lab/robots"]["main"])
    finally:
        hub.close()
    assert "arm/model_index.json" in names
    assert not {"arm/README.md", "arm/pipeline.py"} & names

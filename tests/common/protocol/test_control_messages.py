"""The messages of the control plane are made from their .proto file as it stands, and by nobody's hand."""

from pathlib import Path

from google.protobuf import descriptor_pb2

from pathfed_common.protocol import control_pb2

PROTO = Path(control_pb2.__file__).with_name("control.proto")


def test_the_messages_in_use_are_those_of_the_proto_file(tmp_path):
    import grpc_tools
    from grpc_tools import protoc

    out, root = tmp_path / "descriptors", PROTO.parents[2]
    include = Path(grpc_tools.__file__).parent / "_proto"
    arguments = ["protoc", f"--proto_path={root}", f"--proto_path={include}", f"--descriptor_set_out={out}", str(PROTO)]
    assert protoc.main(arguments) == 0
    compiled = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file[0]
    used = descriptor_pb2.FileDescriptorProto()
    control_pb2.DESCRIPTOR.CopyToProto(used)
    for message in compiled.message_type:
        for field in message.field:
            field.ClearField("json_name")  # the compiler writes it, the Python code leaves it out
    assert compiled == used


def test_no_message_has_room_for_a_site_name_or_an_error_text():
    # Whose call it is, the certificate says; an error is a code.
    names = {field.name for message in control_pb2.DESCRIPTOR.message_types_by_name.values() for field in message.fields}
    assert not names & {"site", "error", "message", "detail", "reason"}

use super::*;

fn read(name: &str, params: Value) -> Result<Preprocessor> {
    Preprocessor::from_request(name, params.as_object().unwrap(), "controlnets[0].preprocess")
}

#[track_caller]
fn refused(name: &str, params: Value, code: &str, field: &str) -> Error {
    let error = read(name, params).expect_err("the preprocessor should be refused");
    let path = format!("controlnets[0].preprocess.{field}");
    assert_eq!((error.code, error.field.as_deref()), (code, Some(path.as_str())), "{error}");
    assert!(error.remedy.is_some(), "{error}");
    error
}

#[test]
fn every_name_has_defaults_and_is_read_again_from_its_json() {
    for name in NAMES {
        let preprocessor = read(name, json!({})).unwrap();
        let written = preprocessor.to_json();
        assert_eq!(written["name"], name);
        assert_eq!(read(name, written["params"].clone()).unwrap(), preprocessor);
    }
    assert_eq!(read("canny", json!({})).unwrap(), Preprocessor::Canny { low_threshold: 100, high_threshold: 200 });
    let lineart = read("lineart", json!({"gaussian_sigma": 3, "intensity_threshold": null})).unwrap();
    assert_eq!(lineart, Preprocessor::Lineart { gaussian_sigma: 3.0, intensity_threshold: 8.0 });
    let written = json!({"name": "lineart", "params": {"gaussian_sigma": 3.0, "intensity_threshold": 8.0}});
    assert_eq!(lineart.to_json(), written);
}

#[test]
fn the_names_of_other_tools_are_known() {
    for (name, ours) in [
        ("Canny", "canny"),
        ("scribble_xdog", "scribble"),
        ("lineart standard", "lineart"),
        ("soft-edge", "softedge"),
        ("tile_resample", "tile"),
    ] {
        assert_eq!(read(name, json!({})).unwrap().name(), ours);
    }
}

#[test]
fn what_needs_a_net_says_so() {
    for name in UNAVAILABLE.into_iter().chain(["Depth-Anything", "OpenPose"]) {
        let error = refused(name, json!({}), "preprocessor_unavailable", "name");
        assert!(error.message.contains("ready-made maps"), "{error}");
    }
}

#[test]
fn errors_name_the_parameter() {
    let error = refused("cany", json!({}), "invalid_value", "name");
    assert!(error.remedy.unwrap().contains("canny, scribble"));
    assert!(refused(&"x".repeat(9_000), json!({}), "invalid_value", "name").message.len() < 200);
    refused("canny", json!({"low": 1}), "unknown_field", "params.low");
    refused("invert", json!({"low_threshold": 1}), "unknown_field", "params.low_threshold");
    refused("canny", json!({"low_threshold": -1}), "out_of_range", "params.low_threshold");
    refused("canny", json!({"high_threshold": 2041}), "out_of_range", "params.high_threshold");
    refused("canny", json!({"high_threshold": 1.5}), "invalid_type", "params.high_threshold");
    refused("canny", json!({"low_threshold": "100"}), "invalid_type", "params.low_threshold");
    refused("tile", json!({"down_sampling_rate": 0.5}), "out_of_range", "params.down_sampling_rate");
    refused("tile", json!({"down_sampling_rate": [2]}), "invalid_type", "params.down_sampling_rate");
    refused("lineart", json!({"gaussian_sigma": 0}), "out_of_range", "params.gaussian_sigma");
}
